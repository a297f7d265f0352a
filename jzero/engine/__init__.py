"""The two engines: a step that jzero wrote (`composed`), and any other (`opaque`)."""
