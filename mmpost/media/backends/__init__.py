"""What decodes inside the child process of ``mmpost.media.limits``; nothing here runs in the training process."""
