"""Deciding: which rank every channel space keeps, and what that costs. Plain data in and out."""
