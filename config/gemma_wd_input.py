# The paper's weight-decay study on Gemma's layout, whose baseline has output-role γ (figure 3):
# IWD, only input-role γ decay.
arch = "gemma"
scale_decay = "input"
