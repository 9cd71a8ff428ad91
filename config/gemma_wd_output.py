# The paper's weight-decay study on Gemma's norms, where output-role γ exist in the baseline: output-role γ decay.
arch = "gemma"
scale_decay = "output"
