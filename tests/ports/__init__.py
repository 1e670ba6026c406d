"""The counterparts of recorded models: each gives a case's objective, parameters and draws, and compares its tensors."""
