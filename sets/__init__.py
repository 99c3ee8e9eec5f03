"""Data sets beyond what data.py reads: descriptions, ImageNet, tars, the Hugging Face hub."""
