"""Scores, computed from PNG files: Fréchet distance of Inception features, dlib face rate."""
