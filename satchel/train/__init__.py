"""Objectives, learning-rate schedules and activation policies."""
