//! `leadctl project`.

use clap::Subcommand;
use contract::rpc;

use crate::{admin::Admin, output};

/// Projects.
#[derive(Debug, Subcommand)]
pub(crate) enum Project {
    /// Create a project.
    #[command(after_help = "Example:\n  leadctl project create --name Sales")]
    Create {
        /// Its name, unique.
        #[arg(long)]
        name: String,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Project {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self::Create { name, admin } = self;
        let project: rpc::Project = admin.call(rpc::PROJECT_CREATE, &rpc::CreateProject { name }).await?;
        if admin.json {
            return output::json(&project);
        }
        output::say(format_args!("project {:?} created", project.name));
        output::field("projectId", project.project_id);
        Ok(())
    }
}
