# AP (paper): the scale vector after each branch, none before it. HG changes nothing here. Figure 5.
placement = "after"
