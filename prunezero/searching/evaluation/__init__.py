"""Evaluation: the rungs, what is known of them already, promotion, and how far rungs agree."""
