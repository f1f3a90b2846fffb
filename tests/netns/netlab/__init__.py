"""An internet of real kernels in one machine: network namespaces, nft boxes, and latency between them."""
