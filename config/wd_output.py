# Weight decay on γ with the output role alone: IWD's opposite.
scale_decay = "output"
