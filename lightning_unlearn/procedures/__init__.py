"""What runs models and Trainers: a forgetting pass, the outputs of a model, and the evaluation of a pass."""
