"""One file per row format and one per container; ``mmpost.data`` holds the tables of their names."""
