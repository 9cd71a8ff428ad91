# The paper's weight-decay study, figure 3, on Gemma's layout, whose baseline has output-role γ: only output-role γ decay.
arch = "gemma"
scale_decay = "output"
