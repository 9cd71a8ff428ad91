# Every γ fixed to 1. Figure 1.
scale_vectors = False
