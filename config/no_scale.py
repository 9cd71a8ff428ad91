# Every γ fixed to 1 (paper: +0.028 loss at 0.12B and the same learning rate, +0.015 after retuning it).
scale_vectors = False
