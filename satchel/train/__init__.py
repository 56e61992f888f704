"""Objectives, learning-rate schedules, activation policies and ways to save checkpoints."""
