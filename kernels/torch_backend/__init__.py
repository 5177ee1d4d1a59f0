"""The torch backend: chunks in dual form, all pieces that have no common past side by side."""
