"""The template of model cards, and the cards that `python -m vlbridge.cards` makes of it."""
