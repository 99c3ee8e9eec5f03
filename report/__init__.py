"""What comes after the measuring: results, tables, figures, documents; and how fast it all runs."""
