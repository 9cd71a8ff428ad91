# IWD (paper): weight decay on γ with the input role, none on γ with the output role.
scale_decay = "input"
