"""Finetuning strategies: which part of CLIP, or beside it, is trained, and how it classifies."""
