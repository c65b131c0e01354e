"""A directory of pairs as users have it -> rows of files and positions, from tables and listings.

`rows` says what a layout is, `find` recognises one; `cvusa` and `own_pairs` are those that there
are. They share `listing`, which finds files by stated paths, and `csv_table`.
"""
