# The paper's weight-decay study on Gemma's norms, where output-role γ exist in the baseline: every γ decays.
arch = "gemma"
scale_decay = "all"
