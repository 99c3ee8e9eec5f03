"""Reading data sets: descriptions, image folders, webdataset shards, the Hugging Face hub."""
