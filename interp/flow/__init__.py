"""Flow of information between tokens across layers, one measure per file."""
