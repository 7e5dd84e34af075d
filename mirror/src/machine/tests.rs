//! Single rules, one test each; interleavings are the simulator's business.
