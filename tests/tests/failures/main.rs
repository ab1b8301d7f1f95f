//! Whole trees of real processes, and what goes wrong in them. One program, so that they wait for the ends of their minutes together.

mod bad_peers;
mod chaos;
mod commands;
mod operations;
mod several_roots;
