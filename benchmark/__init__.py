"""How fast our training steps are beside those of the papers' public code."""
