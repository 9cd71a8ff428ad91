# The paper's weight-decay study, figure 3, on Gemma's layout, whose baseline has output-role γ: IWD, only input-role γ decay.
arch = "gemma"
scale_decay = "input"
