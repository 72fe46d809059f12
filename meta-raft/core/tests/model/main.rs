//! The whole core against a simple reference file system, and exact cases of the data path.
//!
//! - `world`: records in memory, and what must hold of every command
//! - `check`: what must hold of the records of files at any time
//! - `reference`: the file system as POSIX describes it, with the content of files as one note per byte
//! - `script`: random commands, made to hit what exists
//! - `random`: the properties; `cases`: single situations, on a `bench`

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod bench;
mod cases;
mod check;
mod random;
mod reference;
mod reference_content;
mod script;
mod world;
