"""Training bridges."""
