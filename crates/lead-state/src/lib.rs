//! lead-state
