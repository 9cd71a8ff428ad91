# A peer of OR, from Gemma: γ = 1 + w, so that decay pulls γ to 1.
reparam = "zero_centred"
