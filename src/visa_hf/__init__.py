"""Reasoning video segmentation: a video and a sentence in, the masks of the thing it means out."""
