"""Find the tiles of panoramas: of files, or of the rows of a data set."""
