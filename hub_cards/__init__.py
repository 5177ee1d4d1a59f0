"""Model cards: their templates (package data) and what fills them."""
