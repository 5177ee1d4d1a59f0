"""Model cards: their template (package data), what fills it, and the Hub's rules for their metadata."""

from .card import CARD_FILE, find_path, is_own_card, name_card, render_card, write_card
from .facts import FACTS_FILE, CardFacts, ResultFacts, StageFacts, load_facts, save_facts
from .validate import LICENSES, find_problems, validate_card

__all__ = [
    "CARD_FILE",
    "FACTS_FILE",
    "LICENSES",
    "CardFacts",
    "ResultFacts",
    "StageFacts",
    "find_path",
    "find_problems",
    "is_own_card",
    "load_facts",
    "name_card",
    "render_card",
    "save_facts",
    "validate_card",
    "write_card",
]
