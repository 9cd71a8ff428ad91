# The paper's weight-decay study, figure 3, on Gemma's layout, whose baseline has output-role γ: every γ decays.
arch = "gemma"
scale_decay = "all"
