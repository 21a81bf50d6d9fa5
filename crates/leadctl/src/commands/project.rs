//! `leadctl project`.

use clap::Subcommand;
use contract::rpc::CreateProject;

use crate::{clients::admin::Admin, output};

/// Projects.
#[derive(Debug, Subcommand)]
pub(crate) enum Project {
    /// Create a project.
    #[command(after_help = "Example:\n  leadctl project create --name Sales")]
    Create {
        /// A unique name.
        #[arg(long)]
        name: String,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Project {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self::Create { name, admin } = self;
        let show = |project: &contract::rpc::Project| {
            output::say(format_args!("project {:?} created", project.name));
            output::field("projectId", project.project_id);
        };
        admin.show(&CreateProject { name }, show).await
    }
}
