//! webhook-notifier
