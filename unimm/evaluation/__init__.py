"""Evaluation: worlds and judges, any-to-any accuracy, reconstruction, recipes' pipeline, pages."""
