//! Control side of Sluice.
