"""The demo: a real training on scikit-learn's digits, two requests, and an honest comparison."""
