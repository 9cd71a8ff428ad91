# γ = 1 + w, as Gemma has it, so that decay pulls γ to 1.
reparam = "zero_centred"
