# The paper's weight-decay study on Gemma's norms, where output-role γ exist in the baseline: IWD: input-role γ decay.
arch = "gemma"
scale_decay = "input"
