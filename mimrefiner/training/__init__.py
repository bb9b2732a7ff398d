"""The training stages as plain loops, and what keeps them alive."""
