"""What a pair is: its rows, its pictures, its files, and where they lie."""
