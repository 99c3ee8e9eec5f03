"""What is made of records: tables, figures and the results page; and measures of features."""
