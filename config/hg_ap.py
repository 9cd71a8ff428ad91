# HG + AP (paper): the scale vector after each branch, none before it. Without one before W there is none to share
# either, so HG changes nothing here. Figure 5.
heterogeneous = True
placement = "after"
