"""Results and pictures in, one self-contained HTML page or an image grid out."""
