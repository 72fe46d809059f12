//! Decorators of object stores.
//!
//! - [`failing`]: errors, short and flipped bodies, lost acknowledgements, from a seed; for tests

pub mod failing;
