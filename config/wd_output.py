# Weight decay only on γ with the output role: IWD's opposite.
scale_decay = "output"
